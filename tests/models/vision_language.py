"""Models of text and images, called with text: the language tower is worked on, the others are said to stay dense."""

from __future__ import annotations

from entry import Entry

TOWERS = ("*vision*", "*visual*", "*image*", "*projector*", "*connector*", "*aligner*", "*audio*", "*mm_*")
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

VISION_LANGUAGE = (
    Entry("LlavaForConditionalGeneration", apart=TOWERS, quick=True),
    Entry("AriaForConditionalGeneration", apart=(*TOWERS, "*router*")),
    Entry("AyaVisionForConditionalGeneration", apart=TOWERS),
    Entry("Cohere2VisionForConditionalGeneration", {"alignment_intermediate_size": 96}, apart=TOWERS),
    Entry("DeepseekVLForConditionalGeneration", apart=TOWERS),
    Entry("Gemma3ForConditionalGeneration", apart=TOWERS),
    Entry("Gemma4ForConditionalGeneration", apart=TOWERS),
    Entry("GotOcr2ForConditionalGeneration", apart=TOWERS),
    Entry("Idefics2ForConditionalGeneration", apart=TOWERS),
    Entry("Idefics3ForConditionalGeneration", apart=TOWERS),
    Entry("InternVLForConditionalGeneration", apart=TOWERS),
    Entry("LlavaNextForConditionalGeneration", apart=TOWERS),
    Entry("LlavaOnevisionForConditionalGeneration", apart=TOWERS),
    Entry("LightOnOcrForConditionalGeneration", apart=TOWERS),
    Entry("Mistral3ForConditionalGeneration", apart=TOWERS),
    Entry("MllamaForConditionalGeneration", apart=TOWERS),
    Entry("PaliGemmaForConditionalGeneration", apart=TOWERS),
    Entry("Qwen2VLForConditionalGeneration", {"text_config": SECTIONS}, apart=TOWERS),
    Entry("Qwen2_5_VLForConditionalGeneration", {"text_config": SECTIONS}, apart=TOWERS),
    Entry("Qwen3VLForConditionalGeneration", apart=TOWERS),
    Entry("Qwen3VLMoeForConditionalGeneration", apart=(*TOWERS, "*.gate.weight")),
    Entry("Qwen3_5ForConditionalGeneration", {"text_config": LINEAR}, apart=TOWERS),
    Entry("Qwen3_5MoeForConditionalGeneration", {"text_config": LINEAR}, apart=(*TOWERS, "*.gate.weight")),
    Entry("SmolVLMForConditionalGeneration", apart=TOWERS),
    Entry("VipLlavaForConditionalGeneration", apart=TOWERS),
)
