"""Sizes of every model: one row per size, the number of parameters first, then what differs from the defaults of the
configuration. `from_preset` in `utils/options.py` reads them.

The compression f is patch_size x 2^(stages - 1), in pixels or frames. `tiny` trains on a CPU in minutes, `small` is for
one consumer GPU. A string stands for a row that was renamed: saved checkpoints and scripts may still use the old name.
"""

from typing import Any


def preset(parameters: int, **fields: Any) -> dict[str, Any]:
    """A row: fields of the configuration, beside the number of parameters of the model that they give."""
    return {"parameters": parameters, **fields}


def stream(parameters: int, **fields: Any) -> dict[str, Any]:
    """A row of text, images (latents of 8 x 8 at f8) and audio in one stream; bytes, 5 special tokens, 96 lengths."""
    tokens = {"vocab_size": 258 + 5 + 96, "eos_token_id": 1, "null_token_id": 258, "audio_length_token_id": 263}
    tokens |= {"image_begin_token_id": 259, "image_end_token_id": 260}
    tokens |= {"audio_begin_token_id": 261, "audio_end_token_id": 262}
    flows = {"time_mean": 0.8, "time_std": 1.2, "guidance_scale": 2.0}
    both = {f"{name}_{field}": value for name in ("image", "audio") for field, value in flows.items()}
    stack = {"modalities": ["text", "image", "audio"], "n_query_groups": 2, "use_qk_norm": True}
    loss = {"text_loss_weight": 0.2, "image_encoder_patch_size": 2}
    return preset(parameters, **stack, **tokens, **both, **loss, **fields)


# fmt: off
IMAGE_VAE: dict[str, dict[str, Any] | str] = {
    "tiny":      preset(   660_704, image_size=64, latent_channels=16, patch_size=4, encoder_widths=[64, 128],
                                    decoder_widths=[64, 128], n_encoder_blocks=[1, 1], n_decoder_blocks=[1, 2]),  # f8
    "tiny-f4":   preset(   647_444, image_size=64, latent_channels=8, patch_size=2, encoder_widths=[64, 128],
                                    decoder_widths=[64, 128], n_encoder_blocks=[1, 1], n_decoder_blocks=[1, 2]),  # f4
    "tiny-f16":  preset( 1_170_896, image_size=64, latent_channels=32, patch_size=4, encoder_widths=[64, 128, 128],
                                    decoder_widths=[64, 128, 128], n_encoder_blocks=[1, 1, 1],
                                    n_decoder_blocks=[1, 1, 2]),  # f16
    "small":     preset( 5_219_488, image_size=256, latent_channels=16, patch_size=4, encoder_widths=[128, 256],
                                    decoder_widths=[128, 256], n_encoder_blocks=[2, 2], n_decoder_blocks=[4, 4]),  # f8
    "small-f4":  preset( 5_198_548, image_size=256, latent_channels=8, patch_size=2, encoder_widths=[128, 256],
                                    decoder_widths=[128, 256], n_encoder_blocks=[2, 2], n_decoder_blocks=[4, 4]),  # f4
    "small-f16": preset( 6_620_688, image_size=256, latent_channels=32, patch_size=4, encoder_widths=[128, 256, 256],
                                    decoder_widths=[128, 256, 256], n_encoder_blocks=[1, 1, 2],
                                    n_decoder_blocks=[2, 2, 3]),  # f16
    "medium":    preset(20_787_232, image_size=256, latent_channels=16, patch_size=4, encoder_widths=[256, 512],
                                    decoder_widths=[256, 512], n_encoder_blocks=[2, 2], n_decoder_blocks=[4, 4]),  # f8
    "large":     preset(82_986_784, image_size=256, latent_channels=16, patch_size=4, encoder_widths=[512, 1024],
                                    decoder_widths=[512, 1024], n_encoder_blocks=[2, 2],
                                    n_decoder_blocks=[4, 4]),  # f8
    "ldm":       preset(83_653_863, architecture="ldm", image_size=256, latent_channels=4, patch_size=1,
                                    encoder_widths=[128, 256, 512, 512], decoder_widths=[128, 256, 512, 512],
                                    n_encoder_blocks=[2] * 4, n_decoder_blocks=[3] * 4, use_quant_conv=True),  # f8
}

RECURRENT_VAE: dict[str, dict[str, Any] | str] = {
    "tiny":    preset(  285_900, image_size=64, latent_channels=16, patch_size=4, encoder_widths=[64, 128],
                                 n_encoder_blocks=[1, 1], canvas_patch_size=2, decoder_width=32,
                                 n_decoder_blocks=1),  # f8
    "tiny-f4": preset(  258_588, image_size=64, latent_channels=8, patch_size=2, encoder_widths=[64, 128],
                                 n_encoder_blocks=[1, 1], canvas_patch_size=2, decoder_width=32,
                                 n_decoder_blocks=1),  # f4
    "small":   preset(2_054_924, image_size=256, latent_channels=16, patch_size=4, encoder_widths=[128, 256],
                                 n_encoder_blocks=[2, 2], canvas_patch_size=2, decoder_width=96,
                                 n_decoder_blocks=2),  # f8
    "medium":  preset(8_414_220, image_size=256, latent_channels=16, patch_size=4, encoder_widths=[256, 512],
                                 n_encoder_blocks=[2, 2], canvas_patch_size=2, decoder_width=192,
                                 n_decoder_blocks=3),  # f8
}

IMAGE_DIFFUSION: dict[str, dict[str, Any] | str] = {
    "tiny":   preset(  3_185_200, latent_channels=16, latent_size=8, widths=[96, 192], n_blocks=[2, 2],
                                  use_attention=[False, True], conditioning_width=256, text_width=128, max_tokens=96,
                                  n_text_layers=1),
    "small":  preset( 20_900_228, latent_channels=4, latent_size=16, widths=[128, 256, 512], n_blocks=[2, 2, 2],
                                  use_attention=[False, True, True], conditioning_width=384, text_width=256,
                                  max_tokens=128),
    "medium": preset(139_174_672, latent_channels=16, latent_size=32, widths=[256, 512, 1024], n_blocks=[2, 3, 4],
                                  use_attention=[False, True, True], conditioning_width=512, head_width=64,
                                  text_width=512, max_tokens=256, n_text_layers=4, text_head_width=64,
                                  n_gram_buckets=4096),
    "ldm":    preset(859_521_732, architecture="ldm", schedule="scaled_linear", prediction="epsilon",
                                  latent_channels=4, latent_size=64, widths=[320, 640, 1280, 1280], n_blocks=[2] * 4,
                                  use_attention=[True] * 3 + [False], n_heads=8, text_encoder="frozen", text_width=768,
                                  text_embedding_width=768),
}

AUDIO_VAE: dict[str, dict[str, Any] | str] = {
    "tiny":    preset( 1_432_956, width=256, n_encoder_blocks=2, n_decoder_blocks=3),  # f2
    "tiny-2d": preset(   375_512, architecture="conv2d", latent_channels=8, patch_frames=4, width=128, n_encoder_blocks=2, n_decoder_blocks=3),  # f4
    "small":   preset( 4_913_532, width=384, n_encoder_blocks=3, n_decoder_blocks=5),  # f2
    "medium":  preset(10_756_732, width=512, n_encoder_blocks=4, n_decoder_blocks=6),  # f2
    "base":    "medium",
}

AUDIO_DIFFUSION: dict[str, dict[str, Any] | str] = {
    "tiny":   preset(  4_730_985, widths=[192, 256], n_blocks=[2, 3], n_attentions=[0, 2], conditioning_width=256,
                        text_width=192, frame_width=192),
    "small":  preset( 20_271_913, widths=[384, 512], n_blocks=[2, 4], n_attentions=[0, 3], conditioning_width=384,
                        text_width=384, frame_width=384),
    "medium": preset( 57_574_313, widths=[512, 768], n_blocks=[3, 6], n_attentions=[0, 5], conditioning_width=512,
                        text_width=512, frame_width=512, n_token_blocks=4, n_trunk_blocks=3),
    "large":  preset(253_455_657, widths=[768, 1024, 1280], n_blocks=[3, 3, 8], n_attentions=[0, 2, 8],
                        conditioning_width=768, text_width=768, frame_width=768, n_token_blocks=6,
                        n_duration_blocks=3, n_trunk_blocks=4),
}

VOCODER: dict[str, dict[str, Any] | str] = {
    "tiny":       preset(   431_811, width=96,  n_layers=4),
    "small":      preset( 3_720_195, width=256, n_layers=8),
    "medium":     preset(13_730_307, width=512, n_layers=8, n_half_rate_layers=4, n_projections=1),
    "hifigan-v1": preset(13_926_017, architecture="hifigan", hifigan_width=512),
    "hifigan-v2": preset(   925_985, architecture="hifigan", hifigan_width=128),
    "base":       "medium",
    "hifigan_v1": "hifigan-v1",
    "hifigan_v2": "hifigan-v2",
}

# Heads are 64 wide, which attention kernels like best; llama-8m has the shape of the benchmarks. A recurrent row has
# as many layers as the row it is named after, split into prelude, core and coda.
MEGATRANSFORMER: dict[str, dict[str, Any] | str] = {
    "tiny":             preset(  3_017_984, hidden_size=256,  n_layers=4,  n_heads=4,  n_query_groups=2, use_qk_norm=True),
    "small":            preset( 22_686_208, hidden_size=512,  n_layers=8,  n_heads=8,  n_query_groups=2, use_qk_norm=True),
    "medium":           preset(100_094_208, hidden_size=768, n_layers=12, n_heads=12, n_query_groups=4,
                                            use_qk_norm=True, vocab_size=32000, loss_chunk_size=1024),
    "large":            preset(298_635_264, hidden_size=1024, n_layers=24, n_heads=16, n_query_groups=4,
                                            use_qk_norm=True, vocab_size=32000, loss_chunk_size=1024),
    "recurrent-tiny":   preset(  3_019_264, hidden_size=256, n_layers=0, n_prelude_layers=1, n_recurrent_layers=2,
                                            n_coda_layers=1, n_heads=4, n_query_groups=2, use_qk_norm=True,
                                            recurrent_mean_thinking_steps=4, recurrent_max_thinking_steps=16),
    "recurrent-small":  preset( 22_690_816, hidden_size=512, n_layers=0, n_prelude_layers=2, n_recurrent_layers=4,
                                            n_coda_layers=2, n_heads=8, n_query_groups=2, use_qk_norm=True),
    "recurrent-medium": preset(100_104_192, hidden_size=768, n_layers=0, n_prelude_layers=3, n_recurrent_layers=6,
                                            n_coda_layers=3, n_heads=12, n_query_groups=4, use_qk_norm=True,
                                            vocab_size=32000, loss_chunk_size=1024),
    "recurrent-large":  preset(298_660_864, hidden_size=1024, n_layers=0, n_prelude_layers=6, n_recurrent_layers=12,
                                            n_coda_layers=6, n_heads=16, n_query_groups=4, use_qk_norm=True,
                                            vocab_size=32000, loss_chunk_size=1024),
    "llama-8m":         preset(  8_524_032, hidden_size=256, n_layers=8, n_heads=8, intermediate_size=704,
                                            vocab_size=4096, tie_word_embeddings=False, loss_chunk_size=512),
}

MULTIMODAL: dict[str, dict[str, Any] | str] = {
    "multimodal-tiny":           stream( 5_796_368, hidden_size=256, n_layers=3, n_heads=4),
    "multimodal-small":          stream(35_878_544, hidden_size=512, n_layers=8, n_heads=8),
    "multimodal-recurrent-tiny": stream( 5_796_624, hidden_size=256, n_layers=1, n_recurrent_layers=2,
                                                    n_heads=4, recurrent_mean_thinking_steps=3,
                                                    recurrent_max_thinking_steps=12,
                                                    recurrent_use_sandwich_norm=False),
}
# fmt: on
