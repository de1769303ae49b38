"""What people read: the model card, the report as a page, plots."""
