"""NABLA inside other libraries, one file for each; importing one imports its library.

diffusers      Kandinsky 5, Kandinsky 6 SR, Wan, HunyuanVideo: enable(pipe); backend name "nabla"
transformers   an attention implementation by name
sdpa           any model: F.scaled_dot_product_attention within a context
formats        masks as FlashAttention 4, cuDNN and FlashInfer take them
"""
