"""Healing an operated model: the LightningModule, its objectives and its optimizer."""
