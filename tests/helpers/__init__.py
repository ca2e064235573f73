"""What tests share: small models and rewards, stand-ins, references."""
