"""Global attention: the only place where frames meet, and so the only memory of a scene.

Every variant satisfies `base.QkvAttention` and these laws (test/test_attention_laws.py):
reading never changes a state; a saved state is the same state; `fixed_size` states have the
same bytes however many frames were written; permuting the frames of a call permutes its
outputs; frames that were written are read back unchanged with ``write=False``.
"""
