"""The policy: parse, evaluate, explain, prove. Order never matters; nothing matching is a denial."""
