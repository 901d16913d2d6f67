"""Makes all models known to transformers: after `import model.auto`, `AutoModel.from_pretrained(folder)` opens each.

The language model is also opened by `AutoModelForCausalLM`, for which `model.causal` suffices; `AutoModel` gives its
trunk. What a folder holds is read from its config.json.
"""

from transformers import AutoConfig, AutoModel, PreTrainedModel

from model.audio.diffusion import AudioDiffusion
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.causal import MegaTransformerModel
from model.image.diffusion import ImageDiffusion
from model.image.recurrent_vae import RecurrentVAE
from model.image.vae import ImageVAE
from model.multimodal.model import MegaTransformerMultimodal
from utils.configuration import MegaTransformerConfig

MODELS: tuple[type[PreTrainedModel], ...] = (ImageVAE, RecurrentVAE, AudioVAE, Vocoder, ImageDiffusion, AudioDiffusion)

for model_class in MODELS:
    config_class = model_class.config_class
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
# One configuration for two models: `architectures` decides, and the first one is for all other names.
AutoModel.register(MegaTransformerConfig, (MegaTransformerModel, MegaTransformerMultimodal), exist_ok=True)
