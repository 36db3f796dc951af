"""Labelled training images made from single-tissue images: the paper's Mosaic and what it compares with."""

from pistoseg.synthesis.bank import TissueBank
from pistoseg.synthesis.sampling import address_rng
from pistoseg.synthesis.strategies import Synthesizer

__all__ = ["Synthesizer", "TissueBank", "address_rng"]
