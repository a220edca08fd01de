"""`qexp report`: runs over seeds beside the papers' numbers. No module here imports torch."""
