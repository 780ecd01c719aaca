"""What DeRTa is, without any host: records, transform, refusal token, loss. Imports torch and the standard library."""
