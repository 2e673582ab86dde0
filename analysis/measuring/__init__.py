"""The engine: pairs of convolution and BN, moments, folding, measurement, frames."""
