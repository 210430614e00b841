"""Read, decode and write checkpoints as streams. The way of a tensor from Hugging Face to NeMo:

families/gpt_oss.py   says which Hugging Face tensor becomes which Megatron tensor, and how
opened.py             opens it as a model whose tensors are all there
convert.py            makes the plan: which bytes go where
huggingface.py        finds the tensor in the files (shards.py, pytorch_bin.py) and reads it; codecs.py decodes it
torch_dist.py         says where it is in NeMo's distributed checkpoint, and reads such checkpoints
classic.py            says the same of the classic layout (classic_plan.py writes it, classic_reader.py reads it)
stream.py             carries out the plan: read, transform, write, with a journal, so that a run can continue
"""
