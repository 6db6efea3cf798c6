"""Backbones: every one maps (B, 3, H, W) to (B, D) features."""
