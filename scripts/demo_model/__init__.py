"""Parts of `scripts/train_demo_model.py`: text and tokenizer, network, optimizer, model card."""
