"""Who runs next, and with how many rows: values in, a plan out."""
