"""Beginnings of prompts that were read before: kept in host memory, and not computed again.

The model is a hybrid. Keys and values of any first n tokens are a part of those of more, but the recurrent
states after n tokens can be had only by stopping there. So what is kept are snapshots: the recurrent states
after some number of tokens, with the keys and values up to there.

**The law: an answer is the same, bit for bit, with this cache and without, whatever it holds.** Sums are
rounded, and where a prompt is cut into chunks decides how. A snapshot may therefore stand for the reading of
its tokens only where every prompt that begins with them is cut as the one that left it. `cuts.CutLaw` is made
for that: a cut depends on what comes before it alone, never on the rest of the prompt, on the cache or on
what else runs, and it is the same law with the cache switched off. It cuts at full chunks, and at the ends of
a chat's messages, since that is where chats go on differently. A message shorter than the law's `least` has
no cut of its own: a chunk costs a pass over nearly all experts, however short it is.

**What follows for chats.** The second turn's prompt is the first's, the answer, and a new message. The first
is not read again, apart from what lies behind its last cut: the words with which the template opens the
answer, and messages shorter than `least`. The answer's states after decoding, which the worker had when it
ended, are of no use: a step of decode rounds otherwise than a chunk, and otherwise again in another batch, so
what the second turn says would depend on whether, and beside whom, the first was answered here. So the answer
is read as a part of the next prompt, and that is done before there is one, while the worker has nothing else
to do (`next_turns`). If it comes to that, and the client sends back what it got, the second turn reads its
own message alone.

`tree` keeps the snapshots; `reading` takes them, and puts them into a place, while a prompt is read. All is
the engine's thread's; device memory is never taken.
"""
