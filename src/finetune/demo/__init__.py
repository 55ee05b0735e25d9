"""The carried base model and data set, and how both are made."""
