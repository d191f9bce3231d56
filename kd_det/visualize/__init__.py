"""Pictures of what is distilled: maps, attention, masks, RoIs, graphs and logits of one batch."""
