"""Reading records back: what `import surgery` adds to transformers' `from_pretrained`."""
