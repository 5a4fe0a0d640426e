"""The fast path: a Llama-like decoder's training step with its backward pass written by hand.

Autograd through PEFT's modules saves four times what a backward pass needs, and reads every activation again for each
cast, scale and sum. Here a decoder layer is one function: it keeps what cannot be recomputed without a matrix
multiplication (or less, where memory is short), adds LoRA and residual in passes that are there anyway, and leaves what
lies between the large products to kernels of its own. What it computes is what the modules compute.

job/contract/fast_path.py says which trainings go this way and what their layers keep; job/speed.py does as it says. In
the order of a step:

    model      FastModel: tokens in, loss out. Has the adapters copied, calls the layers, and then the loss.
    attention  Documents, the rows of a batch laid end to end; and attention that keeps them apart.
    layer      A decoder layer as one autograd function: what it keeps of its forward pass, and every gradient. It
               consists of four groups (q k v; o; gate up; down) and of what lies between them.
    offload    Inputs of layers that wait for the backward pass in the host's memory.
    linear     Group: linears that read the same input, frozen weights and adapters together, both ways.
    frozen     Frozen weights as the matrices they stand for: as they are, or out of 4 bits, for which nf4 is the
               kernel.
    fp8        The same in e4m3, for products of both passes.
    narrow     The adapter's products: down to R ranks, up again, and the gradients of both.
    dropout    Of what an adapter reads, computed from where a number is: there is no mask.
    pointwise  Norms, rotation, SwiGLU, cross entropy, e4m3, and the gradients.
    loss       The last norm, the head and the cross entropy, a chunk of tokens at a time, gradient included.

kernels chooses whose pointwise and narrow run: torch's, which are the reference, or Triton's, with the same signatures:
triton_narrow, triton_pointwise, triton_heads (norms of q and k) and triton_swiglu.

Shapes: M tokens, K inputs, N outputs, R ranks, D features of a head. What a function "uses up" it may write over: who
calls it has no further use for that. `small` is a matrix in e4m3, with a scale for each row.

tests/job: test_fast holds all of it to the modules in float64, and test_fast_pointwise its parts; test_fast_gpu and
test_fast_model_gpu hold Triton's kernels to torch's, on a GPU or interpreted; test_fast_kernels compiles them for GPUs
that are not there; test_fast_training trains and resumes; test_fast_offload and test_offload_gpu are about the host.
"""
