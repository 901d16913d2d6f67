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

# fmt: off
RECURRENT_VAE = {                                                                                                                             # parameters
    "tiny":       dict(image_size=64,  latent_channels=16, patch_size=4, encoder_widths=[64, 128],        n_encoder_blocks=[1, 1], canvas_patch_size=2, decoder_width=32,  n_decoder_blocks=1),  #  0.29 M  f8
    "tiny-f4":    dict(image_size=64,  latent_channels=8,  patch_size=2, encoder_widths=[64, 128],        n_encoder_blocks=[1, 1], canvas_patch_size=2, decoder_width=32,  n_decoder_blocks=1),  #  0.26 M  f4
    "small":      dict(image_size=256, latent_channels=16, patch_size=4, encoder_widths=[128, 256],       n_encoder_blocks=[2, 2], canvas_patch_size=2, decoder_width=96,  n_decoder_blocks=2),  #  2.05 M  f8
    "medium":     dict(image_size=256, latent_channels=16, patch_size=4, encoder_widths=[256, 512],       n_encoder_blocks=[2, 2], canvas_patch_size=2, decoder_width=192, n_decoder_blocks=3),  #  8.41 M  f8
}
# fmt: on
RECURRENT_VAE_PARAMETERS = {
    "tiny": 285_900,
    "tiny-f4": 258_588,
    "small": 2_054_924,
    "medium": 8_414_220,
}

# fmt: off
IMAGE_DIFFUSION = {                                                                                                                                                                                                  # parameters
    "tiny":       dict(latent_channels=16, latent_size=8,  widths=[96, 192],        n_blocks=[2, 2],    use_attention=[False, True],       conditioning_width=256, text_width=128, max_tokens=96, n_text_layers=1),             #   3.19 M
    "small":      dict(latent_channels=4,  latent_size=16, widths=[128, 256, 512],  n_blocks=[2, 2, 2], use_attention=[False, True, True], conditioning_width=384, text_width=256, max_tokens=128),                    #  20.90 M
    "medium":     dict(latent_channels=16, latent_size=32, widths=[256, 512, 1024], n_blocks=[2, 3, 4], use_attention=[False, True, True], conditioning_width=512, head_width=64, text_width=512, max_tokens=256, n_text_layers=4, text_head_width=64, n_gram_buckets=4096),  # 139.17 M
    "ldm":        dict(architecture="ldm", schedule="scaled_linear", prediction="epsilon", latent_channels=4, latent_size=64, widths=[320, 640, 1280, 1280], n_blocks=[2] * 4, use_attention=[True] * 3 + [False], n_heads=8, text_encoder="frozen", text_width=768, text_embedding_width=768),  # 859.52 M
}
# fmt: on
IMAGE_DIFFUSION_PARAMETERS = {
    "tiny": 3_185_200,
    "small": 20_900_228,
    "medium": 139_174_672,
    "ldm": 859_521_732,
}

# fmt: off
AUDIO_VAE = {                                                                                                               # parameters
    "tiny":       dict(width=256, n_encoder_blocks=2, n_decoder_blocks=3),                                                  #  1.43 M  f2
    "tiny-2d":    dict(architecture="conv2d", latent_channels=8, patch_frames=4, width=128, n_encoder_blocks=2, n_decoder_blocks=3),  #  0.38 M  f4
    "small":      dict(width=384, n_encoder_blocks=3, n_decoder_blocks=5),                                                  #  4.91 M  f2
    "base":       dict(width=512, n_encoder_blocks=4, n_decoder_blocks=6),                                                  # 10.76 M  f2
}
# fmt: on
AUDIO_VAE_PARAMETERS = {
    "tiny": 1_432_956,
    "tiny-2d": 375_512,
    "small": 4_913_532,
    "base": 10_756_732,
}

# fmt: off
VOCODER = {                                                                            # parameters
    "tiny":       dict(width=96,  n_layers=4),                                         #  0.43 M
    "small":      dict(width=256, n_layers=8),                                         #  3.72 M
    "base":       dict(width=512, n_layers=8, n_half_rate_layers=4, n_projections=1),  # 13.73 M
    "hifigan_v1": dict(architecture="hifigan", hifigan_width=512),                     # 13.93 M
    "hifigan_v2": dict(architecture="hifigan", hifigan_width=128),                     #  0.93 M
}
# fmt: on
VOCODER_PARAMETERS = {
    "tiny": 431_811,
    "small": 3_720_195,
    "base": 13_730_307,
    "hifigan_v1": 13_926_017,
    "hifigan_v2": 925_985,
}

# Heads are 64 wide, which attention kernels like best; llama-8m has the shape of the benchmarks. A recurrent row has
# as many layers as the row it is named after, split into prelude, core and coda.
# fmt: off
MEGATRANSFORMER = {                                                                                                                                                                                                                         # parameters
    "tiny":             dict(hidden_size=256,  n_layers=4,  n_heads=4,  n_query_groups=2, use_qk_norm=True),                                                                                                                                #   3.02 M
    "small":            dict(hidden_size=512,  n_layers=8,  n_heads=8,  n_query_groups=2, use_qk_norm=True),                                                                                                                                #  22.69 M
    "medium":           dict(hidden_size=768,  n_layers=12, n_heads=12, n_query_groups=4, use_qk_norm=True, vocab_size=32000, loss_chunk_size=1024),                                                                                        # 100.09 M
    "large":            dict(hidden_size=1024, n_layers=24, n_heads=16, n_query_groups=4, use_qk_norm=True, vocab_size=32000, loss_chunk_size=1024),                                                                                        # 298.64 M
    "recurrent-tiny":   dict(hidden_size=256,  n_layers=0,  n_prelude_layers=1, n_recurrent_layers=2,  n_coda_layers=1, n_heads=4,  n_query_groups=2, use_qk_norm=True, recurrent_mean_thinking_steps=4, recurrent_max_thinking_steps=16),  #   3.02 M
    "recurrent-small":  dict(hidden_size=512,  n_layers=0,  n_prelude_layers=2, n_recurrent_layers=4,  n_coda_layers=2, n_heads=8,  n_query_groups=2, use_qk_norm=True),                                                                    #  22.69 M
    "recurrent-medium": dict(hidden_size=768,  n_layers=0,  n_prelude_layers=3, n_recurrent_layers=6,  n_coda_layers=3, n_heads=12, n_query_groups=4, use_qk_norm=True, vocab_size=32000, loss_chunk_size=1024),                            # 100.10 M
    "recurrent-large":  dict(hidden_size=1024, n_layers=0,  n_prelude_layers=6, n_recurrent_layers=12, n_coda_layers=6, n_heads=16, n_query_groups=4, use_qk_norm=True, vocab_size=32000, loss_chunk_size=1024),                            # 298.66 M
    "llama-8m":         dict(hidden_size=256,  n_layers=8,  n_heads=8,  intermediate_size=704, vocab_size=4096, tie_word_embeddings=False, loss_chunk_size=512),                                                                            #   8.52 M
}
# fmt: on
MEGATRANSFORMER_PARAMETERS = {
    "tiny": 3_017_984,
    "small": 22_686_208,
    "medium": 100_094_208,
    "large": 298_635_264,
    "recurrent-tiny": 3_019_264,
    "recurrent-small": 22_690_816,
    "recurrent-medium": 100_104_192,
    "recurrent-large": 298_660_864,
    "llama-8m": 8_524_032,
}
