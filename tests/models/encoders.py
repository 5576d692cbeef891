"""Encoders, with heads and without, and encoder-decoders."""

from __future__ import annotations

from entry import Entry

ENCODERS = (
    Entry("BertForMaskedLM", quick=True),
    Entry("BertModel"),
    Entry("BertForSequenceClassification"),
    Entry("BertForTokenClassification"),
    Entry("BertForQuestionAnswering"),
    Entry(
        "AlbertForMaskedLM",
        apart=("*embedding_hidden_mapping_in*", "*predictions.dense*"),
    ),
    Entry("CamembertForMaskedLM"),
    Entry("DebertaV2ForSequenceClassification"),
    Entry("DebertaV2Model"),
    Entry("DistilBertForMaskedLM"),
    Entry("DistilBertForTokenClassification"),
    Entry("ElectraForMaskedLM"),
    Entry("EuroBertForMaskedLM"),
    Entry("ModernBertForMaskedLM"),
    Entry("ModernBertModel"),
    Entry("MPNetModel"),
    Entry("NomicBertForMaskedLM"),
    Entry("RobertaForMaskedLM"),
    Entry("RobertaForSequenceClassification"),
    Entry("XLMRobertaForTokenClassification"),
    Entry("XLMRobertaModel"),
    Entry("T5EncoderModel"),
    Entry("T5ForConditionalGeneration", inputs="sequences"),
    Entry("MT5ForConditionalGeneration", inputs="sequences"),
    Entry("BartForConditionalGeneration", inputs="sequences"),
    Entry("BlenderbotForConditionalGeneration", inputs="sequences"),
    Entry("LEDForConditionalGeneration", inputs="sequences"),
    Entry("M2M100ForConditionalGeneration", inputs="sequences"),
    Entry("MarianMTModel", inputs="sequences"),
    Entry("MBartForConditionalGeneration", inputs="sequences"),
    Entry("PegasusForConditionalGeneration", inputs="sequences"),
    Entry("ProphetNetForConditionalGeneration", inputs="sequences"),
    Entry("T5GemmaForConditionalGeneration", inputs="sequences"),
    Entry("UMT5ForConditionalGeneration", inputs="sequences"),
    Entry("WhisperForConditionalGeneration", {"max_source_positions": 32}, inputs="speech", apart=("*.encoder.conv*",)),
)
