package l7

import (
	"io"
	"net"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
)

// server is an open connection to a backend, for one client.
type server struct {
	conn     net.Conn
	endpoint *balance.Endpoint
	said     []byte // what was read of it already
}

// abandon closes a connection to a backend that nothing was said on.
func (s *server) abandon() {
	if s != nil {
		s.conn.Close()
		s.endpoint.End(balance.Neutral)
	}
}

// connect to a backend of the client's port, to another one if it can't be reached. What the connection is for ends with the endpoint's End.
func (p *proxy) connect(client *exchange.Client) (*server, error) {
	port := client.Port
	port.Arrived()
	var query balance.Query
	for {
		endpoint, err := port.Pick(&query)
		if err != nil {
			return nil, err
		}
		endpoint.Begin()
		conn, err := p.env.Dial(p.life, endpoint, client.Pod)
		if err == nil {
			return &server{conn: conn, endpoint: endpoint}, nil
		}
		endpoint.End(balance.Failure)
		query.Tried = append(query.Tried, endpoint)
		if p.life.Err() != nil || !port.Retry(len(query.Tried)) {
			return nil, err
		}
	}
}

// refuse resets a client that no backend can be found for.
func (p *proxy) refuse(client *exchange.Client, err error) {
	p.observer.Begin(client, exchange.TCP)
	p.observer.End(&exchange.Record{Protocol: exchange.TCP, Client: client, GRPC: -1, Began: time.Now(), Local: "no backend"})
	p.cfg.Log.Debug("a connection was reset, as no backend could be connected to", "port", client.Port.Key(), "client", client.Address, "error", err)
	reset(client.Conn)
}

// passOn lets client and backend speak to each other, whatever that is, until both have ended. Without a server it connects to one.
func (p *proxy) passOn(client *exchange.Client, s *server) {
	if s == nil {
		var err error
		if s, err = p.connect(client); err != nil {
			p.refuse(client, err)
			return
		}
	}
	defer s.conn.Close()
	p.mu.Lock()
	p.conns[s.conn] = struct{}{} // It is cut when the client's connections are.
	cut := p.life.Err() != nil
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, s.conn)
		p.mu.Unlock()
	}()
	if cut {
		s.endpoint.End(balance.Neutral)
		return
	}

	record := exchange.Record{Protocol: exchange.TCP, Client: client, Endpoint: s.endpoint, GRPC: -1, Began: time.Now()}
	p.observer.Begin(client, exchange.TCP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		record.In = p.copyTo(s.conn, client.Conn, client.Read)
	}()
	record.Out = p.copyTo(client.Conn, s.conn, s.said)
	<-done
	record.Took = time.Since(record.Began)
	s.endpoint.End(balance.Success)
	p.observer.End(&record)
}

// copyTo passes on what comes from one side, behind what was read of it before, and then its end. The kernel moves the bytes, if both are TCP (splice).
// If it fails, both are at an end: neither may wait for what can't come.
func (p *proxy) copyTo(to, from net.Conn, before []byte) int64 {
	first, err := to.Write(before)
	var rest int64
	if err == nil {
		rest, err = io.Copy(to, from)
	}
	half, ok := to.(interface{ CloseWrite() error })
	if err == nil && ok {
		err = half.CloseWrite()
	}
	if err != nil || !ok {
		reset(to)
		reset(from)
	}
	return int64(first) + rest
}
