"""The multimodal model; its name is fixed by the project's design, its parts are the modules of this folder."""

from model.multimodal.model import MegaTransformerMultimodal, MegaTransformerMultimodalEncoder

__all__ = ["MegaTransformerMultimodal", "MegaTransformerMultimodalEncoder"]
