"""INT8 weights and activations of linear layers: what they are, and how they are found from a few hundred texts."""

from distillabse.quantization.calibration import calibrate, rounded
from distillabse.quantization.linears import QuantizedLinear, load_quantized_linears, save_quantized_linears

__all__ = ["QuantizedLinear", "calibrate", "load_quantized_linears", "rounded", "save_quantized_linears"]
