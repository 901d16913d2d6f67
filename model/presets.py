"""Sizes of every model: one row per size, only what differs from the configuration's defaults, parameters at the end."""

# fmt: off
IMAGE_VAE = {                                                                                                                                                           # parameters
    "tiny":   dict(image_size=64,  patch_size=2, encoder_widths=[32, 64, 128],  decoder_widths=[32, 64, 128],  n_encoder_blocks=[1, 1, 1], n_decoder_blocks=[1, 1, 2]),  #  1.2 M
}
# fmt: on
