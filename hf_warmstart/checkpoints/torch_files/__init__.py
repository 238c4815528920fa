"""Files of `torch.save` and folders of `torch.distributed.checkpoint`, read and written piece by piece, executing nothing."""
