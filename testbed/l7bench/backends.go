package main

import "net"

// The backends of each protocol.
var (
	http1Backends = []string{"127.0.0.11:18080", "127.0.0.12:18080"}
	grpcBackends  = []string{"127.0.0.11:18090", "127.0.0.12:18090"}
)

// serveBackends answers at all of them until one fails.
func serveBackends() error {
	failed := make(chan error, len(http1Backends)+len(grpcBackends))
	listen := func(addresses []string, serve func(net.Conn) error) error {
		for _, address := range addresses {
			ln, err := net.Listen("tcp", address)
			if err != nil {
				return err
			}
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						failed <- err
						return
					}
					go func() {
						defer c.Close()
						_ = serve(c) // it ends when the proxy has had enough
					}()
				}
			}()
		}
		return nil
	}
	if err := listen(http1Backends, serveHTTP1); err != nil {
		return err
	}
	if err := listen(grpcBackends, serveGRPC); err != nil {
		return err
	}
	return <-failed
}
