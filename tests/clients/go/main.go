// A plain client of Tollgate, in Go, from nothing but the protos: it embeds a text through the
// router, lists the backends, and tells an unknown model by the reason of its error.
//
//	buf generate ../../.. && go run . ADDRESS MODEL [MODE]
//
// Prints one JSON object; exits with 1 and says why where anything is not as promised.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	embedder "client/pb/tollgate/embedder/v1"
	router "client/pb/tollgate/router/v1"
)

// What the client learned, for whoever started it.
type report struct {
	Dimensions     int       `json:"dimensions"`
	Provider       string    `json:"provider"`
	Simulated      bool      `json:"simulated"`
	HeldNanosUSD   int64     `json:"held_nanos_usd"`
	HoldID         string    `json:"hold_id"`
	RequestID      string    `json:"request_id"`
	ReceiptTrailer bool      `json:"receipt_trailer"`
	Backends       []backend `json:"backends"`
	Refusal        refusal   `json:"refusal"`
}

type backend struct {
	Service  string `json:"service"`
	Provider string `json:"provider"`
	Health   string `json:"health"`
}

type refusal struct {
	Code   string `json:"code"`
	Domain string `json:"domain"`
	Reason string `json:"reason"`
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 || len(os.Args) > 4 {
		log.Fatal("usage: client ADDRESS MODEL [MODE]")
	}
	found, err := run(os.Args[1], os.Args[2], os.Args[3:])
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		log.Fatal(err)
	}
}

func run(address, model string, mode []string) (*report, error) {
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "tollgate-tenant", "acme")
	for _, chosen := range mode {
		ctx = metadata.AppendToOutgoingContext(ctx, "tollgate-mode", chosen)
	}

	found := &report{}
	texts := embedder.NewEmbedderServiceClient(connection)
	if err := embed(ctx, texts, model, found); err != nil {
		return nil, fmt.Errorf("Embed: %w", err)
	}
	if err := list(ctx, router.NewRouterServiceClient(connection), found); err != nil {
		return nil, fmt.Errorf("ListBackends: %w", err)
	}
	found.Refusal, err = refused(ctx, texts)
	return found, err
}

func embed(ctx context.Context, texts embedder.EmbedderServiceClient, model string, found *report) error {
	var trailer metadata.MD
	answer, err := texts.Embed(ctx, &embedder.EmbedRequest{
		Model:  model,
		Inputs: []string{"Who pays the pilot?"},
	}, grpc.Trailer(&trailer))
	if err != nil {
		return err
	}
	if len(answer.Vectors) != 1 {
		return fmt.Errorf("one text came back as %d vectors", len(answer.Vectors))
	}
	found.Dimensions = len(answer.Vectors[0].Values)
	found.Provider = answer.GetProvenance().GetProvider()
	found.Simulated = answer.GetProvenance().GetSimulated()
	found.HeldNanosUSD = answer.GetReceipt().GetHeldNanosUsd()
	found.HoldID = answer.GetReceipt().GetHoldId()
	found.RequestID = answer.GetReceipt().GetRequestId()
	found.ReceiptTrailer = len(trailer.Get("tollgate-receipt-bin")) == 1
	return nil
}

func list(ctx context.Context, gate router.RouterServiceClient, found *report) error {
	answer, err := gate.ListBackends(ctx, &router.ListBackendsRequest{})
	if err != nil {
		return err
	}
	for _, b := range answer.Backends {
		found.Backends = append(found.Backends, backend{b.Service, b.Provider, b.Health.String()})
	}
	return nil
}

// What a typed error looks like to a client: a code, and the reason to branch on.
func refused(ctx context.Context, texts embedder.EmbedderServiceClient) (refusal, error) {
	_, err := texts.Embed(ctx, &embedder.EmbedRequest{Model: "no-such-model", Inputs: []string{"x"}})
	if err == nil {
		return refusal{}, errors.New("an unknown model was embedded with")
	}
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return refusal{status.Code(err).String(), info.Domain, info.Reason}, nil
		}
	}
	return refusal{}, fmt.Errorf("the error has no ErrorInfo: %w", err)
}
