"""Fine-tuning encoders with transformers' standard heads, and zero-shot transfer to other languages."""
