"""Synthetic H&E: images, exact masks, labelled cohorts and slides for the demo and the tests.

No patient's tissue is in them. They look like H&E because they are drawn from the physics of the stain, and say
nothing about how well a model does on real tissue.
"""

from pistoseg.phantom.cohort import write_cohort
from pistoseg.phantom.drawing import draw_image
from pistoseg.phantom.geometry import PHANTOM_CLASSES, draw_mask
from pistoseg.phantom.slides import write_slide

__all__ = ["PHANTOM_CLASSES", "draw_image", "draw_mask", "write_cohort", "write_slide"]
