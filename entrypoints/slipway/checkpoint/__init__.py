"""Reading, decoding and writing checkpoints as streams. A tensor's way from Hugging Face to NeMo:

families/gpt_oss.py   which Hugging Face tensor becomes which Megatron tensor, and how
huggingface.py        finds it in the safetensors files and reads it, decoding MXFP4 or FP8 (quantization.py)
stream.py             moves every cell of the plan: read, transform, write; journal, resume, atomic end
torch_dist.py         puts it at its place in NeMo's distributed checkpoint, and reads such checkpoints
"""
