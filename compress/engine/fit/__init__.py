"""What each layer loses with each option of a quantizer, found in one sweep, so that a budget can be spent well."""
