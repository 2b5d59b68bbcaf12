"""The sizes of a decoder that takes no time, for benchmarks of whole models."""

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 320,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
