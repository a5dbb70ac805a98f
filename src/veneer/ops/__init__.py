"""What a step multiplies. Each op has a reference in torch in the file that it is named by.

    linear          y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ over the `LinearMap`s and `LowRank` products of a layer
    mlp             gated MLPs and their activations
    attention       of packed rows, and of denoisers
    norms, loss, dropout, conv
    quantized       frozen weights in 4 and 8 bits; quantization_formats: how their values are kept
    weight_layouts, weight_panels, prepacked     frozen weights in the order in which products read them

dispatch.py decides which implementation runs, from profile.py's measurements of the machine; cpu/ and cuda/ have the
compiled ones. device_transfer.py knows tensors that have no values. This package knows raw tensors; it does not know
modules, adapters by name, or models.
"""
