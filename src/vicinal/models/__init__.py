"""Encoders: loaded from three families, adapted, merged, saved."""
