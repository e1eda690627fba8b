"""The demo's identity encoder, for `AutoModel.from_pretrained(this_folder, trust_remote_code=True)`.

It answers whether two pictures show the same object on any background: the demo's stand-in for DINO. Trained by
`demo/build_demo_base.py` (`ConvTower` there).
"""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class IdentityConfig(PretrainedConfig):
    """Channels of the first convolution, and entries of the features."""

    model_type = "demo_identity"

    def __init__(self, width=32, width_out=64, **kwargs):
        self.width, self.width_out = width, width_out
        super().__init__(**kwargs)


class IdentityEncoder(PreTrainedModel):
    """Pixels `[B, 3, 64, 64]` in [-1, 1] -> `pooler_output` `[B, width_out]`."""

    config_class = IdentityConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        widths = (3, config.width, 2 * config.width, 4 * config.width, 4 * config.width)
        layers = []
        for i, (before, after) in enumerate(zip(widths, widths[1:])):
            stride = 2 if i < 3 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.AvgPool2d(2))
        self.head = nn.Linear(4 * config.width * 16, config.width_out)
        self.post_init()

    def forward(self, pixel_values):
        return BaseModelOutputWithPooling(pooler_output=self.head(self.features(pixel_values).flatten(1)))
