"""The steps of tree speculation that are worth a kernel of their own, each with its plain-PyTorch form, which is the CPU path."""
