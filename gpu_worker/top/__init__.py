"""`gpu-worker top`: a live view of one worker and its store, made of what both tell anybody."""
