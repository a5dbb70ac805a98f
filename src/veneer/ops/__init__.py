"""What a step multiplies: a file a noun, each op with its reference in torch beside it.

    linear        y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ over the `LinearMap`s and `LowRank` products of a layer
    mlp           gated MLPs and their activations
    attention     of rows that lie one after another, and of denoisers
    norms, loss, dropout, conv
    quantised     frozen weights in 4 and 8 bits; quantisation_formats: how their values are kept

Which implementation runs is decided in choice.py; cpu/ and cuda/ have the compiled ones. transfer.py knows tensors that
have no values. Knows raw tensors; does not know modules, adapters by name, or models.
"""
