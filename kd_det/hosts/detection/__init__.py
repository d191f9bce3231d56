"""What the detection hosts share."""
