"""The fast path: a Llama-like decoder's training step with its backward pass written by hand.

Autograd through PEFT's modules saves four times what a backward pass needs, and reads every activation again for each
cast, scale and sum. Here a decoder layer is one function: it keeps what cannot be recomputed without a matrix
multiplication (or less, where memory is short), adds LoRA and residual in passes that are there anyway, and leaves what
lies between the large products to kernels of its own. What it computes is what the modules compute; tests hold it to
float64 autograd.
"""
