"""Small CLIPs shaped like those of older releases: the same parts, names and order of axes, with torch alone.

open_clip's blocks take tokens before images ([N, b, D]) up to 2.24, and OpenAI's always do. Weights of the
same names and shapes as open_clip's load into all of them.
"""

from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

# What tells the releases apart, as far as these shapes go.
RELEASES = {
    "openai": {"names_patch": False},
    "open_clip 2.0": {"early": True},
    "open_clip 2.16": {"layer_scale": True, "names_pool": "global_average_pool"},
    "open_clip 2.24": {"layer_scale": True, "names_pool": "pool_type", "norm_all": True},
    "open_clip 2.26": {"layer_scale": True, "names_pool": "pool_type", "norm_all": True, "batch_first": True},
}


class Norm(nn.LayerNorm):
    """In float32 for a model of half precision, as all of them do it."""

    def forward(self, x):
        exact = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return super().forward(exact).to(x.dtype)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, batch_first, layer_scale, early):
        super().__init__()
        self.ln_1 = Norm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.ln_2 = Norm(width)
        steps = {
            "c_fc": nn.Linear(width, 2 * width),
            "gelu": nn.GELU(),
            "c_proj": nn.Linear(2 * width, width),
        }
        if early:
            self.ln_attn = nn.Identity()
            steps = {"c_fc": steps["c_fc"], "ln": nn.Identity(), **steps}
        self.mlp = nn.Sequential(OrderedDict(steps))
        if layer_scale:
            self.ls_1, self.ls_2 = Scale(width), Scale(width)

    def forward(self, x):
        y = self.ln_1(x)
        a = self.attn(y, y, y, need_weights=False)[0]
        a = self.ln_attn(a) if hasattr(self, "ln_attn") else a
        x = x + (self.ls_1(a) if hasattr(self, "ls_1") else a)
        m = self.mlp(self.ln_2(x))
        return x + (self.ls_2(m) if hasattr(self, "ls_2") else m)


class Transformer(nn.Module):
    """From 2.25 on it says which order its blocks take."""

    def __init__(self, blocks, batch_first):
        super().__init__()
        self.resblocks = nn.Sequential(*blocks)
        if batch_first:
            self.batch_first = True

    def forward(self, x):
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """It reads out its class token, or, with pool="avg", a mean; which up to 2.20 took in the class token."""

    def __init__(self, release, layers=3, width=32, heads=4, patch=(4, 4), grid=(2, 3), dim=24, pool="tok"):
        super().__init__()
        facts = RELEASES[release]
        if facts.get("names_patch", True):
            self.patch_size = patch
        self.averages = pool == "avg"
        if facts.get("names_pool") == "pool_type":
            self.pool_type, self.attn_pool = pool, None
        if facts.get("names_pool") == "global_average_pool":
            self.global_average_pool, self.attn_pool = self.averages, None
        self.norm_all, self.batch_first = facts.get("norm_all", False), facts.get("batch_first", False)
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid[0] * grid[1] + 1, width))
        self.ln_pre = Norm(width)
        shape = (self.batch_first, facts.get("layer_scale", False), facts.get("early", False))
        self.transformer = Transformer([Block(width, heads, *shape) for _ in range(layers)], self.batch_first)
        self.ln_post = Norm(width)
        self.proj = nn.Parameter(torch.randn(width, dim) / width**0.5)

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.transformer(x)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.ln_post(x) if self.norm_all else x
        x = x[:, 1 if self.norm_all else 0 :].mean(dim=1) if self.averages else x[:, 0]
        return (x if self.norm_all else self.ln_post(x)) @ self.proj


class CLIP(nn.Module):
    def __init__(self, release, **shape):
        super().__init__()
        self.visual = VisionTransformer(release, **shape)
        self.logit_scale = nn.Parameter(torch.tensor(14.3).log())

    def encode_image(self, images):
        return self.visual(images.to(self.visual.conv1.weight.dtype))


class HuggingFace(nn.Module):
    """The parts of transformers' CLIPModel, or of its SiglipModel, with torch alone."""

    class Part(nn.Module):
        def __init__(self, run, **parts):
            super().__init__()
            self.run = run
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, *args, **options):
            return self.run(self, *args, **options)

    def __init__(self, siglip=False, layers=2, width=32, heads=4, patch=4, grid=(2, 3), dim=24):
        super().__init__()
        count = grid[0] * grid[1] + (not siglip)
        token = {} if siglip else {"class_embedding": nn.Parameter(torch.randn(width))}
        patches, self.position = nn.Conv2d(3, width, patch, patch), nn.Parameter(torch.randn(count, width))
        embeddings = self.Part(None, patch_embedding=patches, patch_size=patch, **token)
        encoder = self.Part(None, layers=nn.ModuleList(self.block(width, heads) for _ in range(layers)))
        parts = {"embeddings": embeddings, "encoder": encoder, "post_layernorm": nn.LayerNorm(width)}
        if siglip:
            pool = {
                "attention": nn.MultiheadAttention(width, heads, batch_first=True),
                "mlp": self.mlp(width),
            }
            parts["head"] = self.Part(None, probe=nn.Parameter(torch.randn(1, 1, width)), **pool)
        else:
            self.visual_projection = nn.Linear(width, dim, bias=False)
        self.vision_model = self.Part(self.run, **parts)

    def mlp(self, width):
        parts = {"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)}
        return self.Part(lambda m, x: m.fc2(m.activation_fn(m.fc1(x))), activation_fn=nn.GELU(), **parts)

    def block(self, width, heads):
        maps = {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        config = SimpleNamespace(_attn_implementation="sdpa")

        def attend(m, x):
            q, k, v = (
                m.get_submodule(f"{name}_proj")(x).unflatten(2, (heads, -1)).transpose(1, 2) for name in "qkv"
            )
            return m.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None

        parts = {
            "self_attn": self.Part(attend, num_heads=heads, config=config, **maps),
            "mlp": self.mlp(width),
        }
        parts |= {"layer_norm1": nn.LayerNorm(width), "layer_norm2": nn.LayerNorm(width)}

        def run(m, x):
            x = x + m.self_attn(m.layer_norm1(x))[0]
            return (x + m.mlp(m.layer_norm2(x)),)  # as in transformers 4; in 5 it is no tuple

        return self.Part(run, **parts)

    def run(self, m, pixel_values):
        x, head = (
            m.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2),
            getattr(m, "head", None),
        )
        if head is None:
            x = torch.cat([m.embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = x + self.position
        for layer in m.encoder.layers:
            x = layer(x)[0]
        if head is None:
            return x, m.post_layernorm(x[:, 0])
        x = m.post_layernorm(x)
        pooled = head.attention(head.probe.expand(len(x), -1, -1), x, x)[0]
        return x, (pooled + head.mlp(pooled))[:, 0]

    def get_image_features(self, pixel_values):
        pooled = self.vision_model(pixel_values=pixel_values)[1]
        return self.visual_projection(pooled) if hasattr(self, "visual_projection") else pooled
