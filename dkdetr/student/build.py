"""Builds students from settings: the one place where a configuration becomes modules."""

from torch import nn

from dkdetr.config import ClassifierConfig, ExperimentConfig, StudentConfig
from dkdetr.errors import UsageError
from dkdetr.student.backbone import Backbone, resnet50, slim_resnet
from dkdetr.student.decoder import DecoderLayer, DeformableDecoder
from dkdetr.student.deformable_attention import MultiScaleDeformableAttention
from dkdetr.student.detector import DKDETR, ProposingTrunk
from dkdetr.student.encoder import DeformableEncoder, EncoderLayer, FeedForward
from dkdetr.student.heads import BoxHead, SimilarityCalibration, TextClassifier
from dkdetr.student.mask_head import MaskHead
from dkdetr.student.neck import ChannelMapper
from dkdetr.student.queries import KDQueryPlan
from dkdetr.student.query_selection import QuerySelection


def build_student(config: ExperimentConfig, *, text_dim: int, load_weights: bool = True) -> DKDETR:
    """Returns a student with fresh weights beyond its backbone's.

    Args:
        config: the experiment.
        text_dim: width of the vocabulary's embeddings.
        load_weights: False leaves the backbone random too: a checkpoint will fill it.
    """
    student, classifier = config.student, config.classifier
    trunk = build_trunk(student, load_weights=load_weights)
    num_levels = trunk.neck.num_levels
    layers = [_decoder_layer(student, num_levels) for _ in range(student.num_decoder_layers)]
    decoder = DeformableDecoder(layers, [BoxHead(student.embed_dim) for _ in layers])
    return DKDETR(
        trunk,
        decoder,
        [_classifier(student, classifier, text_dim) for _ in layers],
        num_queries=student.num_queries,
        num_heads=student.num_heads,
        embed_dim=student.embed_dim,
        kd=_kd_queries(config),
        calibration=_calibration(config),
        num_hybrid=config.kd.hybrid_queries,
        denoising_content=nn.Linear(text_dim, student.embed_dim) if student.denoising else None,
        mask_head=_mask_head(student) if student.mask_head else None,
    )


def _kd_queries(config: ExperimentConfig) -> KDQueryPlan | None:
    kd = config.kd
    if not (kd.enabled and kd.auxiliary_queries):
        return None
    own = kd.alignment != "cached"
    num_places = kd.anchored_regions + (config.student.num_queries if own else 0)
    return KDQueryPlan(
        num_anchored=kd.anchored_regions,
        at_own_anchors=own,
        num_slots=num_places if kd.content == "slots" else 0,
    )


def _calibration(config: ExperimentConfig) -> SimilarityCalibration | None:
    skd = config.kd.skd
    if not (config.kd.enabled and skd.weight > 0 and skd.loss == "siglip_bias"):
        return None
    return SimilarityCalibration(temperature=skd.temperature, bias=skd.bias)


def build_trunk(config: StudentConfig, *, load_weights: bool = True) -> ProposingTrunk:
    """Returns backbone, neck, encoder and first stage of a student."""
    if config.embed_dim % 32 or config.embed_dim % config.num_heads:
        raise UsageError(
            f"student.embed_dim = {config.embed_dim} must be a multiple of 32 and of "
            f"student.num_heads = {config.num_heads}"
        )
    backbone = _backbone(config, load_weights=load_weights)
    neck = ChannelMapper(
        backbone.num_channels,
        config.embed_dim,
        extra_levels=config.backbone.extra_levels,
        bias=config.neck_bias,
    )
    layers = [
        EncoderLayer(_attention(config, neck.num_levels), _feed_forward(config), config.dropout)
        for _ in range(config.num_encoder_layers)
    ]
    return ProposingTrunk(
        backbone,
        neck,
        DeformableEncoder(layers),
        QuerySelection(config.embed_dim),
        embed_dim=config.embed_dim,
    )


def _backbone(config: StudentConfig, *, load_weights: bool) -> Backbone:
    settings = config.backbone
    weights = settings.weights if load_weights else "random"
    if settings.arch == "slim_resnet":
        return slim_resnet(
            weights=weights,
            norm=settings.norm,
            frozen_stages=settings.frozen_stages,
            used_stages=settings.stages,
            width=settings.width,
        )
    if settings.width != 64:
        raise UsageError(f"student.backbone.width = {settings.width}: resnet50 knows only 64")
    return resnet50(
        weights=weights,
        norm=settings.norm,
        frozen_stages=settings.frozen_stages,
        used_stages=settings.stages,
    )


def _attention(config: StudentConfig, num_levels: int) -> MultiScaleDeformableAttention:
    return MultiScaleDeformableAttention(
        config.embed_dim, config.num_heads, num_levels, config.num_points
    )


def _feed_forward(config: StudentConfig) -> FeedForward:
    return FeedForward(config.embed_dim, config.ffn_dim, config.dropout)


def _decoder_layer(config: StudentConfig, num_levels: int) -> DecoderLayer:
    self_attention = nn.MultiheadAttention(
        config.embed_dim, config.num_heads, dropout=config.dropout, batch_first=True
    )
    return DecoderLayer(
        self_attention, _attention(config, num_levels), _feed_forward(config), config.dropout
    )


def _mask_head(config: StudentConfig) -> MaskHead:
    attention = MultiScaleDeformableAttention(
        config.embed_dim, num_heads=1, num_levels=1, num_points=4
    )
    layer = EncoderLayer(attention, _feed_forward(config), config.dropout)
    return MaskHead(
        DeformableEncoder([layer]),
        embed_dim=config.embed_dim,
        stride=config.mask_stride,
        masks_at_once=config.masks_at_once,
    )


def _classifier(
    config: StudentConfig, classifier: ClassifierConfig, text_dim: int
) -> TextClassifier:
    return TextClassifier(
        config.embed_dim,
        text_dim,
        temperature=classifier.temperature,
        bias_init=classifier.bias_init,
    )
