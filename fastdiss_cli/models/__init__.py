"""The models. Names and sizes are here, where shell completion finds them without torch."""

from typing import Any

FAMILIES = ("transformer", "difformer", "fastdiss")  # modules of this package, in this order
# options of `layers.NetworkConfig`
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(model_dim=128, ffn_dim=512, heads=2, encoder_layers=2, decoder_layers=2),
    "small": dict(model_dim=256, ffn_dim=1024, heads=4, encoder_layers=4, decoder_layers=4),
    "iwslt_de_en": dict(
        model_dim=512, ffn_dim=1024, heads=4, encoder_layers=6, decoder_layers=6, dropout=0.3
    ),
    "base": dict(model_dim=512, ffn_dim=2048, heads=8, encoder_layers=6, decoder_layers=6),
}
