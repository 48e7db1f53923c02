"""What several test files share: bounds of errors, and the sizes of the small models that they build."""

# float64 rounds at 1e-16; sums of some thousand terms that partly cancel stay six digits below this.
EXACT = 1e-10
SINGLE = 1e-5  # float32 rounds at 6e-8; the longest sums here lose one digit more
# bfloat16 rounds at 4e-3 in every step of a forward pass; the docstring of `check` allows this much.
HALF = 3e-2
FAR = 1e-3  # what a negative control must differ by at least: far from any rounding error

# Three blocks, four heads, 2 x 3 patches.
VISION = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 4, "image_size": (8, 12), "mlp_ratio": 2.0}
TEXT_TOWER = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
# Every norm and scale that open_clip's blocks can have inside.
INNER = dict.fromkeys(("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True)
INNER |= {"ls_init_value": 0.3}
