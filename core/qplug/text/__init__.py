"""What datasets share: windows of tokens, and text from the Hub."""
