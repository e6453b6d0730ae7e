"""A sampler that fits the model: levels and coefficients chosen for one data set, network, budget and guidance."""
