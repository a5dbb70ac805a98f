"""Ops for training and serving steps, each with a torch reference in the same file.

    linear          y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ over the `LinearMap`s and `LowRank` products of a layer
    mlp             gated MLPs and their activations
    attention       attention over packed rows, and attention in denoisers
    norms, loss, dropout, conv
    quantized       frozen weights in 4 and 8 bits
    quantization_formats                         storage formats of quantized weights
    weight_layouts, weight_panels, prepacked     frozen weights in the order in which products read them

dispatch.py chooses implementations based on profile.py's measurements of the machine. cpu/ and cuda/ contain
the compiled implementations. device_transfer.py detects fake tensors. This package works on raw tensors, and
does not depend on modules, adapter names or models."""
