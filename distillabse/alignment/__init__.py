"""Word alignment: which words of a sentence and of its translation mean the same."""

from distillabse.alignment.links import Aligner, WordLinks, align_pairs, aligned_links, require_aligner

__all__ = ["Aligner", "WordLinks", "align_pairs", "aligned_links", "require_aligner"]
