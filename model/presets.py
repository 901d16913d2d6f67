"""Sizes of every model: one row per size, only what differs from the configuration's defaults, parameters at the end.

The compression f is patch_size x 2^(stages - 1). `tiny` trains on a CPU in minutes; `small` is for one consumer GPU.
"""

# fmt: off
IMAGE_VAE = {                                                                                                                                                                                                        # parameters
    "tiny":       dict(image_size=64,  latent_channels=16, patch_size=4, encoder_widths=[64, 128],        decoder_widths=[64, 128],        n_encoder_blocks=[1, 1],    n_decoder_blocks=[1, 2]),                       #  0.66 M  f8
    "tiny-f4":    dict(image_size=64,  latent_channels=8,  patch_size=2, encoder_widths=[64, 128],        decoder_widths=[64, 128],        n_encoder_blocks=[1, 1],    n_decoder_blocks=[1, 2]),                       #  0.65 M  f4
    "tiny-f16":   dict(image_size=64,  latent_channels=32, patch_size=4, encoder_widths=[64, 128, 128],   decoder_widths=[64, 128, 128],   n_encoder_blocks=[1, 1, 1], n_decoder_blocks=[1, 1, 2]),                    #  1.17 M  f16
    "small":      dict(image_size=256, latent_channels=16, patch_size=4, encoder_widths=[128, 256],       decoder_widths=[128, 256],       n_encoder_blocks=[2, 2],    n_decoder_blocks=[4, 4]),                       #  5.22 M  f8
    "small-f4":   dict(image_size=256, latent_channels=8,  patch_size=2, encoder_widths=[128, 256],       decoder_widths=[128, 256],       n_encoder_blocks=[2, 2],    n_decoder_blocks=[4, 4]),                       #  5.20 M  f4
    "small-f16":  dict(image_size=256, latent_channels=32, patch_size=4, encoder_widths=[128, 256, 256],  decoder_widths=[128, 256, 256],  n_encoder_blocks=[1, 1, 2], n_decoder_blocks=[2, 2, 3]),                    #  6.62 M  f16
    "medium":     dict(image_size=256, latent_channels=16, patch_size=4, encoder_widths=[256, 512],       decoder_widths=[256, 512],       n_encoder_blocks=[2, 2],    n_decoder_blocks=[4, 4]),                       # 20.79 M  f8
    "large":      dict(image_size=256, latent_channels=16, patch_size=4, encoder_widths=[512, 1024],      decoder_widths=[512, 1024],      n_encoder_blocks=[2, 2],    n_decoder_blocks=[4, 4]),                       # 82.99 M  f8
    "ldm":        dict(architecture="ldm", image_size=256, latent_channels=4, patch_size=1, encoder_widths=[128, 256, 512, 512], decoder_widths=[128, 256, 512, 512], n_encoder_blocks=[2] * 4, n_decoder_blocks=[3] * 4, use_quant_conv=True),  # 83.65 M  f8
}
# fmt: on
IMAGE_VAE_PARAMETERS = {
    "tiny": 660_704,
    "tiny-f4": 647_444,
    "tiny-f16": 1_170_896,
    "small": 5_219_488,
    "small-f4": 5_198_548,
    "small-f16": 6_620_688,
    "medium": 20_787_232,
    "large": 82_986_784,
    "ldm": 83_653_863,
}
