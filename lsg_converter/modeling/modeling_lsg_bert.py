"""LSG BERT: the facts of the family."""

from transformers.models.bert import configuration_bert, modeling_bert as bert

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGHead,
    LSGModel,
    LSGSelfAttention,
    with_global_tokens,
)


class LSGBertConfig(LSGConfig, configuration_bert.BertConfig): ...


class LSGBertEmbeddings(LSGEmbeddings, bert.BertEmbeddings): ...


class LSGBertSelfAttention(LSGSelfAttention, bert.BertSelfAttention): ...  # type: ignore[misc]


class LSGBertEncoder(LSGEncoder, bert.BertEncoder): ...


class LSGBertModel(LSGModel, bert.BertModel):
    config_class = LSGBertConfig
    lsg_modules = {
        bert.BertEmbeddings: LSGBertEmbeddings,
        bert.BertSelfAttention: LSGBertSelfAttention,
        bert.BertEncoder: LSGBertEncoder,
    }
    global_token_type = True
    forward = with_global_tokens(bert.BertModel.forward)


class LSGBertHead(LSGHead):
    lsg_model_class = LSGBertModel


class LSGBertForPreTraining(LSGBertHead, bert.BertForPreTraining): ...


class LSGBertForMaskedLM(LSGBertHead, bert.BertForMaskedLM): ...


class LSGBertLMHeadModel(LSGBertHead, bert.BertLMHeadModel): ...


class LSGBertForNextSentencePrediction(LSGBertHead, bert.BertForNextSentencePrediction): ...


class LSGBertForSequenceClassification(LSGBertHead, bert.BertForSequenceClassification): ...


class LSGBertForMultipleChoice(LSGBertHead, bert.BertForMultipleChoice): ...


class LSGBertForTokenClassification(LSGBertHead, bert.BertForTokenClassification): ...


class LSGBertForQuestionAnswering(LSGBertHead, bert.BertForQuestionAnswering): ...
