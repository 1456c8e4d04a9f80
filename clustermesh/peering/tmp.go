package peering

import "context"

func (s *Service) MarkLeft(ctx context.Context, name, user string) error { return nil }
func (s *Service) Problems() []string { return nil }
