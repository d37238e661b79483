"""Foreign files <-> our trees: safetensors, Hugging Face model directories, chat templates, exported programs."""
